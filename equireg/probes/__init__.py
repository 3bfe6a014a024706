"""What frozen features can do: classify, turn with the image, tell how the image was transformed."""
