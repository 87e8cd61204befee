"""The fault bench: a real cluster under load, faults at named points and at random, and what streams notice."""
