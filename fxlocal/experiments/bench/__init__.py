"""What a step costs, measured in turns."""
