"""Tables and plots from results, without running anything."""
