"""What one picture says about itself: header, strict decode, measures, perceptual hash. Knows nothing of corpora."""
