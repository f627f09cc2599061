"""What the attacks share: the target that they match, searches, labels, and the exact algebra of single layers."""
