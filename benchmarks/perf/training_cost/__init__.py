"""What a step of streaming training costs: the model, its feed, several workers, and a peer."""
