"""What a signature takes: keys, certificates, timestamps, bundles, and how to verify them. No policy, no request."""
