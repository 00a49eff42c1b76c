"""Programs that are not ours, in interpreters of their own: started, asked to play, ended."""
