"""Stand-ins for other libraries' modules; none of those libraries is imported."""
