"""What a number on a grid is: arithmetic only."""
