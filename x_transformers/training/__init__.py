"""What training needs around a model: optimisers for its parameters, and several processes."""
