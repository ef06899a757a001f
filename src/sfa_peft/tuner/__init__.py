"""`SFAModel`: injects a plan, installs tickets, combines and merges adapters."""
