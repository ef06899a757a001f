"""What goes where: architectures, the base model, budgets, and the plan of an injection."""
