"""The command line: reads recipes, calls stages, words errors. No torch."""
