"""What the exporters share: a plan as they read it, the engines' options, and three grammars."""
