"""What a fast run is worth: frames in, numbers and pictures out."""
