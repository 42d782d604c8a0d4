"""What is given to trainers: each module imports the trainer it is for, and waits until somebody names it."""
