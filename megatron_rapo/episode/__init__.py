"""What a user's file sees of a sample: problems, scores, sequences, episodes, and their protocols."""
