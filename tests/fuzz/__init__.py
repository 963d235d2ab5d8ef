"""Random input for everything that a user types or passes: `make fuzz`, and a short part of each in the tests."""
