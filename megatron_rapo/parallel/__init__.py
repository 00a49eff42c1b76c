"""Process groups, layouts, devices."""
