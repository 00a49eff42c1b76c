"""What a run is made of, as its directory tells: contents, configurations, and what it may go on with."""
