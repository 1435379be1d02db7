"""The loss as a whole: what it returns, who gets which gradient, and where it runs."""
