"""Plans: schedules, cache layouts, what each layer runs."""
