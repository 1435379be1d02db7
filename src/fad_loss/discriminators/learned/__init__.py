"""Discriminators that learn: networks over points, neighbourhoods and clouds."""
