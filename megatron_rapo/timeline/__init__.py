"""When each rank was in which phase, and each engine at a request: kept by every run, drawn by `trace`."""
