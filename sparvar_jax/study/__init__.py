"""Looking inside a generation: attention, teacher forcing."""
