"""How far pictures, predictions and weights are from an original's."""
