"""Ranks: their shards of the classes, the sample of a step, their collectives and what they must agree on."""
