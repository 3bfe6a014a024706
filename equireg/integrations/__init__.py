"""Training frameworks, each of which brings a package of its own: imported only by who asks for it."""
