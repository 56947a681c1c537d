"""May it: what attestors saw, what the policy says of it, and the grant that follows."""
