"""What a machine has and lacks for runs, and for one run: software, host, links between ranks."""
