-- One visit to the shop, for pgbench: inserts, updates and deletes in all tables.
\set customer random(1, 200)
\set product random(1, 50)
\set quantity random(1, 9)
\set chance random(1, 100)
BEGIN;
INSERT INTO shop.visits (page, seconds) VALUES ('/product/' || :product, :chance / 7.0);
INSERT INTO shop.orders (customer_id) VALUES (:customer) RETURNING id AS order_id \gset
INSERT INTO shop.order_lines SELECT :order_id, 1, sku, :quantity, price FROM shop.products WHERE sku = 'sku-' || :product;
UPDATE shop.products SET stock = stock - :quantity WHERE sku = 'sku-' || :product;
\if :chance <= 60
INSERT INTO shop.payments (order_id, amount) SELECT order_id, quantity * price FROM shop.order_lines WHERE order_id = :order_id;
UPDATE shop.orders SET state = 'paid' WHERE id = :order_id;
\elif :chance <= 80
DELETE FROM shop.order_lines WHERE order_id = :order_id;
UPDATE shop.orders SET state = 'cancelled' WHERE id = :order_id;
\elif :chance <= 90
UPDATE shop.customers SET preferences = jsonb_build_object('last', :product::int) WHERE id = :customer;
\endif
COMMIT;
