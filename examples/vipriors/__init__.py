"""The VIPriors recipe; ``__main__`` says what it does."""
