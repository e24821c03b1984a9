"""Linear recurrences over tokens as functions of tensors, each with several kernels that compute the same."""
