"""Speed, memory and accuracy next to other libraries, on the same networks, data and products."""
