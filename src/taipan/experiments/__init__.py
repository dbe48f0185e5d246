"""What this project shows, as commands anyone can run again."""
