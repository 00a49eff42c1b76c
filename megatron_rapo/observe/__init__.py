"""What a run tells of itself: metrics, progress, and where each rank is."""
