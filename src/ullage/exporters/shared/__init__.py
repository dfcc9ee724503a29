"""What the exporters share: a plan as they read it, options, what servers set, three grammars."""
