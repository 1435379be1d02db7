"""What the defaults of fad_loss rest on: many runs of the main job, side by side."""
