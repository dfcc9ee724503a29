"""What `ullage plan` prints: one file a kind of answer. No commands here."""
