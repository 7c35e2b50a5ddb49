"""Attaches an adapter to a graph that somebody else exported or quantised.

read.py      opens the graph; its weights stay where they are
products.py  every product with a stored weight, whatever its form: what it reads, what it gives, what it is called
             (stored.py, scales.py, parts.py: what is behind their weights, ahead of them, and how they are taken apart)
names.py     what a name says: the layer, and the projection in it
place.py     the same from the graph alone: who reads what
claims.py    both, product by product
weigh.py     compares products with a base's weights
             (numbers.py reads a product's; likeness.py tells what rounding leaves from a factor)
match.py     adapter's modules -> products, by all of these; refuses what is missing, doubled or contradicted
fused.py     names what holds projections inside of it
insert.py    puts the op's nodes behind the products
run.py       all of it: a foreign graph and an adapter in, a bundle out
"""
