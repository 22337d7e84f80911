"""What a learned switch is: probability only."""
