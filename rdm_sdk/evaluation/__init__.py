"""Whether a student is good: figures of sets of images, and tables of students and teachers beside each other."""
