"""Measuring a base, a merged model or an adapter: log-likelihoods, answers, programs."""
