"""What search and evaluation share: queries of texts and pictures, with weights, added and subtracted."""
