"""Ranks: who holds which classes, which classes a step samples, and the collectives between ranks."""
