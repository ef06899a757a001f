"""`SFAModel`, the tuner: injects adapters, installs tickets, and combines and merges adapters."""
