"""Stage II of the VIPriors recipe: distillation from a frozen teacher."""
