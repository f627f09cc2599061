"""What defenses are worth: recordings of defended jobs -> how much two attackers read out of them, and summaries."""
