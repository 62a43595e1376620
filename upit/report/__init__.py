"""What a run left behind, and how it is shown: terminal, pictures, one HTML page."""
