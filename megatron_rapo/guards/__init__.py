"""What a run is watched for, and what is done where it is found."""
