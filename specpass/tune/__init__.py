"""What there is to tune for a target, a draft and a method."""
