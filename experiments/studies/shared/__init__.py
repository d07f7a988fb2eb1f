"""What several studies use: their training loop, comparisons over seeds, and methods that no command offers."""
