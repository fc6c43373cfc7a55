"""What a run will take of its device, said before anything is loaded."""
